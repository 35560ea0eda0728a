from pathlib import Path

import pytest

from vflora.data.config import DataConfig
from vflora.errors import UserError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("num_workers", -1),
        ("wds_shuffle_buf", -1),
        ("max_bad_samples", -1),
        ("secondary_cache_max_size", -5),
        ("p_secondary", 1.5),
        ("augment_r", 1.2),
        ("augment_r", 0.02),
        ("augment_j", -0.1),
    ],
)
def test_settings_out_of_range_are_refused_with_their_flag(field, value):
    with pytest.raises(UserError, match=f"--{field}"):
        DataConfig(wds_root=Path("x"), metadata_key="species", **{field: value})
