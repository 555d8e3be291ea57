"""The digits 0 to 4, or 5 to 9, as a data set of five classes: what a teacher that knows only some classes was trained on."""

import dataclasses

import numpy as np

from raykd.data.sets import open_split
from raykd.data.views import View


class Half(View):
    """Images of some classes, numbered anew from 0."""

    def __init__(self, base, classes):
        labels = np.asarray(base.labels)
        rows = np.flatnonzero(np.isin(labels, classes))
        super().__init__(base, rows, np.searchsorted(classes, labels[rows]).astype(np.int64))
        self.classes = classes

    @property
    def num_classes(self):
        return len(self.classes)


def low(spec, split):
    return Half(open_split(dataclasses.replace(spec, kind="digits", num_classes=10), split), np.arange(5))


def high(spec, split):
    return Half(open_split(dataclasses.replace(spec, kind="digits", num_classes=10), split), np.arange(5, 10))
