"""What goes to the Hub: the exporter, card templates, the demo, and `mats-tiny`, the default model of `mats`."""
