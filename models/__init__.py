"""The networks: a Pixel-Set Encoder followed by one of four temporal encoders and a decoder."""
