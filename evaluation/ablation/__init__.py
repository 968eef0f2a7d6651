"""The paper's ablation (section 4.4), run by one command on any recipe and any labelled sounds."""
