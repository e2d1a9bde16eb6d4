"""Documents are the same for a seed, and what they conclude follows."""

import re

from sphinx_fast.data.tables import documents as read
from sphinx_fast.train.mini.texts import OPPOSITE, document, documents, write_texts


def test_a_document_is_its_seeds():
    assert list(documents(20)) == [document(seed) for seed in range(20)] == list(documents(20))
    assert len(set(documents(200))) == 200


def test_conclusions_follow():
    text = " ".join(documents(300))
    orders = re.findall(
        r"The ([\w ]+?) is (left of|right of|above|below) the ([\w ]+?)\. The \3 is \2 the ([\w ]+?)\."
        r" So the ([\w ]+?) is (\w+(?: of)?) the ([\w ]+?), and the ([\w ]+?) is (\w+(?: of)?) the ([\w ]+?)\.",
        text,
    )
    assert len(orders) > 50
    for a, where, _, c, *end in orders:
        assert end == [a, where, c, c, OPPOSITE[where], a]
    number = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    sums = re.findall(r"There are (\w+) (\w+) \w+ and (\w+) \2 \w+\. So there are (\w+) \2 shapes", text)
    assert len(sums) > 50 and all(number[a] + number[b] == number[c] for a, _, b, c in sums)


def test_the_file_is_read_back_as_it_was(tmp_path):
    path = tmp_path / "texts.txt"
    write_texts(path, 30)
    assert list(read([str(path)])) == list(documents(30))
    path.write_text("mine", encoding="utf-8")
    write_texts(path, 30)
    assert path.read_text() == "mine", "a file that is there is kept"
