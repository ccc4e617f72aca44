"""Write what was measured: one page, one table, one JSON."""
