"""Networks: plain nn.Sequential from the uint8 image to the logits."""
