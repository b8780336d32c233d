"""``kdfast demo``: does distillation pay? Measured on real digits, against the controls that an answer needs."""
