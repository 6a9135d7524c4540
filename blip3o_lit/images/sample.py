"""Members of a tar whose names agree: which caption and label belong to which picture."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from blip3o_lit.images.item import Item, Lost
from blip3o_lit.images.names import Passed, plain, stem_of

LABEL = "cls"


@dataclass(frozen=True)
class Text:
    name: str
    extension: str
    content: str
    further: tuple[str, ...] = ()
    """Captions behind the first."""


@dataclass
class Sample:
    """Members that agree up to the first dot of their name, as they come."""

    name: str
    pictures: list[tuple[str, Callable[[], bytes], int]] = field(default_factory=list)
    """Names, how each is read, and sizes."""
    texts: list[Text] = field(default_factory=list)
    lost: list[tuple[int, Lost]] = field(default_factory=list)
    """What is refused, and the number of pictures before it."""
    cut: bool = False
    """Whether earlier pictures of the same sample were handed on already."""

    @property
    def size(self) -> int:
        pictures = sum(size for _, _, size in self.pictures)
        return pictures + sum(len(text.content) for text in self.texts)

    def lose(self, lost: Lost) -> None:
        self.lost.append((len(self.pictures), lost))

    def entries(self, label: str, passed: Passed) -> Iterator[Item | Lost]:
        """Yield its pictures and refused members in order; count texts that belong to none."""
        several = self.cut or len(self.pictures) > 1
        used: set[str] = set()
        for number, (name, read, _) in enumerate(self.pictures):
            yield from (lost for place, lost in self.lost if place == number)
            near = [text for text in self.texts if not several or self._near(text, name)]
            used |= {text.name for text in near}
            near.sort(key=lambda text: text.name.rpartition(".")[0] == self.name)  # its own first
            own = (text for text in near if text.extension != LABEL and text.content)
            caption = next(own, Text("", "", ""))
            classes = next((t.content for t in near if t.extension == LABEL and t.content), "")
            extra = {"label": classes} if classes else {}
            yield Item(
                f"{label}/{plain(name)}",
                read,
                caption.content,
                extra=extra,
                further=caption.further,
            )
        yield from (lost for place, lost in self.lost if place == len(self.pictures))
        if self.pictures or self.cut or any(lost.image for _, lost in self.lost):
            for text in self.texts:
                if text.name not in used:
                    passed.add(text.name)
        elif self.texts:
            reason = "no picture of this name beside it; `tar --sort=name` keeps the two together"
            yield Lost(f"{label}/{plain(self.texts[0].name)}", reason)

    def _near(self, text: Text, picture: str) -> bool:
        """Whether a text is a picture's own, or that of the whole sample."""
        return stem_of(text.name) in (stem_of(picture), picture, self.name)
