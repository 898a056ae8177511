"""Logits to tokens: penalties, bans, filters, and a counter-based draw per row."""
