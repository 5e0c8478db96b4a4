"""Dropout of what a branch sees of x, for the methods that are used with it."""

import dataclasses
from typing import Any

from keras_svdtune.methods.base import Method
from keras_svdtune.methods.settings import check_number


@dataclasses.dataclass(frozen=True)
class DropsInput(Method):
    """A method whose branch may see a part of x only while it trains.

    Where a layer is called in training, `base.times(a)` is then x̃·A: each
    number of x is zero in x̃ with the probability `dropout`, and otherwise
    divided by 1 - dropout, so that the mean of x̃ is x. `base()` is x·W of x
    itself, as in LoRA's code and PEFT. The method's formulas know nothing of
    it. It is for methods that reach x by `times` alone, and by a low-rank
    branch.

    It says how an adapter is trained, not what its weights mean. So two methods
    that differ in it train alike, and a file without `dropout` has none.
    """

    dropout: float = dataclasses.field(default=0.0, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("dropout", self.dropout, 0.0, 1.0)

    def __str__(self) -> str:
        text = repr(self)
        return f"{text[:-1]}, dropout={self.dropout})" if self.dropout else text

    def settings(self) -> dict[str, Any]:
        # Without dropout, files are those that older releases read.
        found = super().settings()
        if not self.dropout:
            del found["dropout"]
        return found

    def trains_like(self, other: Method) -> bool:
        if isinstance(other, DropsInput):
            other = dataclasses.replace(other, dropout=self.dropout)
        return super().trains_like(other)


def dropout_of(method: Method) -> float:
    """Returns the dropout of a method; 0 for one that has no such setting."""
    return method.dropout if isinstance(method, DropsInput) else 0.0
