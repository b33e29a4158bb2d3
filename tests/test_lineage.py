"""An adapter's card names its base, and another is refused."""

import pytest

from cqlora.base import seal_card
from cqlora.errors import ModelError
from cqlora.lineage import check_fingerprints


def test_fingerprints_that_differ_name_the_tokenizer_or_the_base(tmp_path):
    seal_card(tmp_path, {"base": "b", "base_sha256": "v2-1", "tokenizer_sha256": "v2-2"})
    check_fingerprints(tmp_path, "v2-2", "v2-1")
    with pytest.raises(ModelError, match="another tokenizer"):
        check_fingerprints(tmp_path, "v2-3", "v2-1")
    with pytest.raises(ModelError, match="another base"):
        check_fingerprints(tmp_path, "v2-2", "v2-3")


def test_a_fingerprint_of_samples_is_refused_with_what_to_do(tmp_path):
    seal_card(tmp_path, {"base": "b", "base_sha256": "0" * 64, "tokenizer_sha256": "v2-2"})
    with pytest.raises(ModelError, match=r"by samples of its bytes.* remove base_sha256 and card_sha256"):
        check_fingerprints(tmp_path, "v2-2", "v2-1")
