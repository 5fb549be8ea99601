"""What ``help(Batch)`` shows."""

from __future__ import annotations

from phivision_jax.batch import Batch


def test_docstring_has_a_row_for_every_field() -> None:
    assert Batch.__doc__ is not None
    for field in Batch._fields:
        assert f"\n    {field}  " in Batch.__doc__ or (field == "merge_weight" and "``merge_weight``" in Batch.__doc__)
