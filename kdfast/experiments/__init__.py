"""``kdfast experiments``: every recipe against its controls, on real data, with error bars."""
