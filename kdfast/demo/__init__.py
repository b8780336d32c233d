"""``kdfast demo``: does distillation pay? Measured on real digits, with the controls that an honest answer needs."""
