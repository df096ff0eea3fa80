"""Parts of .ci/wheel: writes pictures of digits to a folder, and passes a model through transformers."""

import sys
from pathlib import Path


def write(folder: Path) -> None:
    """Writes ten digits of scikit-learn as PNG files."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder.mkdir()
    for i, picture in enumerate(load_digits().images[:10]):
        Image.fromarray((picture * 15.9375).round().astype("uint8")).save(folder / f"{i}.png")


def through_transformers(pictures: Path, folder: Path) -> None:
    """Saves a model, loads it as a classifier and as a backbone, and classifies a picture."""
    import torch
    from transformers import AutoBackbone, AutoModelForImageClassification, pipeline

    import odenets.hf

    net = odenets.hf.OdenetsForImageClassification(odenets.hf.OdenetsConfig(name="resnet20")).eval()
    net.save_pretrained(folder)
    again = AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x).logits, net(x).logits)
        maps = AutoBackbone.from_pretrained(folder, out_features=["stage1", "stage3"]).eval()(x).feature_maps
    assert [m.shape[1] for m in maps] == [16, 64]
    classify = pipeline("image-classification", model=str(folder))
    print(classify(str(pictures / "0.png"), top_k=1))


if __name__ == "__main__":
    paths = [Path(arg) for arg in sys.argv[1:] if arg != "--transformers"]
    through_transformers(*paths) if "--transformers" in sys.argv else write(*paths)
