"""Layers whose forward and backward passes are written together."""
