"""How fast the data stage is, beside what people would use instead, measured on their own machine."""
