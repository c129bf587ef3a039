"""Write the digits data set, train.parquet and test.parquet, next to this script.

    pip install scikit-learn datasets[vision] && python training/datasets/digits/make_digits.py

The 1,797 images are the handwritten digits of the UCI set that scikit-learn ships. The split is random and stratified:
the set does not say who wrote which digit, so writers are on both sides.
"""

from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def main() -> None:
    """Write both files; the same bytes of pixels and labels each time."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * 255 / 16).round().astype("uint8")  # ink in 0 ... 16
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    train, test = train_test_split(range(len(pixels)), test_size=360, random_state=0, stratify=labels)
    for split, index in (("train", train), ("test", test)):
        rows = {"image": [PILImage.fromarray(pixels[i]) for i in index], "label": [int(labels[i]) for i in index]}
        Dataset.from_dict(rows, features=features).to_parquet(Path(__file__).with_name(f"{split}.parquet"))


if __name__ == "__main__":
    main()
