"""Trainers: a training set and a model configuration in, a registered artifact out."""
