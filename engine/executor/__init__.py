"""Executors run plans on ranks; which ranks, and where, is the placement's business."""
