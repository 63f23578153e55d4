"""Generation: the options, the logits functions and the step that `generate` and `stream` share."""
