"""Measure a model on text: the room of the scores.

As a function, `langmill.evaluate(EvaluateSettings(model=..., on=[...]))` scores documents and returns a Report
with loss, perplexity and bits per byte.
"""
