"""The DINOv2 image encoder, see the README of this folder."""
