"""Networks, one file per architecture, named after its model_type."""
