"""What a base's weights are packed by, and how they are read back."""
