"""Which columns of a row to keep: the samplers, top-k, and the table of tail prototypes."""
