import random

from phivision_jax.evaluation.scoring.edit_distance import EditDistance


def by_table(one: str, other: str) -> int:
    row = list(range(len(one) + 1))
    for index, character in enumerate(other, 1):
        above, row[0] = row[0], index
        for column, each in enumerate(one, 1):
            above, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, above + (each != character))
    return row[-1]


def test_distance_is_that_of_the_table():
    rng = random.Random(0)
    for _ in range(500):
        one, other = ("".join(rng.choices("abc é🙂\ud800", k=rng.randint(0, 40))) for _ in range(2))
        assert EditDistance(one).to(other) == by_table(one, other)


def test_distances_of_one_text():
    distance = EditDistance("kitten")
    assert [distance.to(each) for each in ("sitting", "kitten", "", "kitte")] == [3, 0, 6, 1]
