"""Networks: their shapes, their order, their first loss."""
