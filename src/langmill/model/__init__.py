"""The one Transformer, the LSTM baseline, and what they are built from."""
