"""The papers behind the methods: what the documentation, the model card and the configs cite."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A citation.

    Attributes:
        title: as printed.
        authors: `Last, First and Last, First`, as BibTeX wants them.
        venue: where it appeared, in words; BibTeX's `journal` or `booktitle`.
        year: of that appearance.
        arxiv: arXiv identifier, empty where there is none.
        key: BibTeX key.
    """

    title: str
    authors: str
    venue: str
    year: int
    arxiv: str
    key: str

    @property
    def url(self) -> str:
        """The paper's arXiv page."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def bibtex(self) -> str:
        """The BibTeX entry."""
        fields = {
            "title": self.title,
            "author": self.authors,
            "journal": self.venue,
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
        }
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@article{{{self.key},\n{body}\n}}"


SSAM = Paper(
    "Stabilizing Sharpness-aware Minimization Through A Simple Renormalization Strategy",
    "Tan, Chengli and Zhang, Jiangshe and Liu, Junmin and Wang, Yicheng and Hao, Yunda",
    "Journal of Machine Learning Research, 26",
    2025,
    "2401.07250",
    "tan2025stable",
)
SAM = Paper(
    "Sharpness-Aware Minimization for Efficiently Improving Generalization",
    "Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam",
    "International Conference on Learning Representations",
    2021,
    "2010.01412",
    "foret2021sam",
)
USAM = Paper(
    "Towards Understanding Sharpness-Aware Minimization",
    "Andriushchenko, Maksym and Flammarion, Nicolas",
    "International Conference on Machine Learning",
    2022,
    "2206.06232",
    "andriushchenko2022understanding",
)
ASAM = Paper(
    "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks",
    "Kwon, Jungmin and Kim, Jeongseop and Park, Hyunseo and Choi, In Kwon",
    "International Conference on Machine Learning",
    2021,
    "2102.11600",
    "kwon2021asam",
)
