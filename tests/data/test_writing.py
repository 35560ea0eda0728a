import io

import numpy as np
import pytest
from PIL import Image

from vflora.data.writing import encode


@pytest.mark.parametrize("quality", [80, 95, 100])
def test_a_picture_full_of_fine_detail_is_stored_too(quality):
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "jpg", quality)
    with Image.open(io.BytesIO(data)) as stored:
        difference = np.asarray(stored).astype(int) - noise
    assert np.abs(difference).mean() < 30


def test_other_pictures_are_stored_in_the_smallest_form(kit):
    image = kit.picture(1, (240, 320))
    assert encode(image, "jpg", 95) == kit.encoded(image, "JPEG", quality=95, subsampling=0, optimize=True)
