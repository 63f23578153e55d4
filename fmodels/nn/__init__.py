"""Stateless mathematics: functions of parameter subtrees and activations, without knowledge of any family."""
