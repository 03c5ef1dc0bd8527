"""Data sets of images with labels: drawn ones with known factors, patches of photographs, CelebA, and any folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probekit import checked
from probekit.hooks.errors import ProbekitError

if TYPE_CHECKING:
    from probekit.data.dataset import Dataset


def load_data(spec: str, image_size: int) -> Dataset:
    """A data set by its name or place, its images `image_size` pixels high and wide.

    spec:
        `avatars`: drawn faces (`probekit.data.avatars.Avatars`);
        `photos`: patches of photographs that installed packages carry (`probekit.data.photos.Photos`);
        `scenes`: captioned pictures of one object (`probekit.data.scenes.Scenes`);
        `celeba:PATH`: `img_align_celeba/` and the labels beside it (`probekit.data.celeba.CelebA`);
        `folder:PATH` or `folder:PATH,labels=FILE`: any images (`probekit.data.folder.ImageFolder`), the labels a csv file in
        that folder or elsewhere;
        `PATH`: a folder, CelebA where it holds `img_align_celeba/`.

    Raises ProbekitError for any other spec, and for what the data set cannot read.
    """
    if image_size < 1:
        raise ProbekitError(f"image size {image_size}: choose 1 pixel or more")
    if spec == "avatars":
        from probekit.data.avatars import Avatars

        return Avatars(image_size)
    if spec == "photos":
        from probekit.data.photos import Photos

        return Photos(image_size)
    if spec == "scenes":
        from probekit.data.scenes import Scenes

        return Scenes(image_size)
    kind, _, place = spec.partition(":") if spec.startswith(("celeba:", "folder:")) else ("", "", spec)
    path, comma, labels = place.partition(",labels=")
    said = f"data set {checked.shown(spec)}"
    root = checked.path(said, path)
    if not path or (comma and not labels) or not (kind or checked.is_folder(root)):
        raise ProbekitError(
            f"{said}: choose avatars, scenes, photos, celeba:PATH, folder:PATH, folder:PATH,labels=FILE.csv, or the path of a "
            "folder"
        )
    if kind == "celeba" or (not kind and not comma and (root / "img_align_celeba").is_dir()):
        from probekit.data.celeba import CelebA

        return CelebA(root, image_size)
    from probekit.data.folder import ImageFolder

    if not comma:
        return ImageFolder(root, image_size)
    file = checked.path(said, labels)
    beside = checked.path(said, root / file)
    return ImageFolder(root, image_size, labels=beside if beside.exists() else file)
