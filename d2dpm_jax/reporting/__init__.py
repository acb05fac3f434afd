"""Figures, tables and the page of what is in a work directory."""
