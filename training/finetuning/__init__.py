"""Recipes that finetune a trained model."""
