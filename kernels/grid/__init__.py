"""Sums that have no order: floats as integers on a grid."""
