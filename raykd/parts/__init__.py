"""Shared by methods: derived signals, adapters, memory, checks, chains of jobs. No Ray.

Axis letters of the whole project: b batch, c classes (logits) or channels (features), h w height and width, d width of an
embedding, n samples of the data set, k candidates, *p any positions (words, pixels). A letter of one side carries s
(student) or t (teacher): `ds`, `dt`. `_h` names an axis that may differ from layer to layer.
"""
