"""Finetuning on conversations: float adapters on a frozen ternary base, or further votes on its trits."""
