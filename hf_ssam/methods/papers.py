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
FRIENDLY_SAM = Paper(
    "Friendly Sharpness-Aware Minimization",
    "Li, Tao and Zhou, Pan and He, Zhengbao and Cheng, Xinwen and Huang, Xiaolin",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    2024,
    "2403.12350",
    "li2024friendly",
)
SPARSE_SAM = Paper(
    "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach",
    "Mi, Peng and Shen, Li and Ren, Tianhe and Zhou, Yiyi and Sun, Xiaoshuai and Ji, Rongrong and Tao, Dacheng",
    "Advances in Neural Information Processing Systems, 35",
    2022,
    "2210.05177",
    "mi2022make",
)
LOOKSAM = Paper(
    "Towards Efficient and Scalable Sharpness-Aware Minimization",
    "Liu, Yong and Mai, Siqi and Chen, Xiangning and Hsieh, Cho-Jui and You, Yang",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    2022,
    "2203.02714",
    "liu2022towards",
)
ESAM = Paper(
    "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks",
    "Du, Jiawei and Yan, Hanshu and Feng, Jiashi and Zhou, Joey Tianyi and Zhen, Liangli and Goh, Rick Siow "
    "Mong and Tan, Vincent Y. F.",
    "International Conference on Learning Representations",
    2022,
    "2110.03141",
    "du2022efficient",
)
AUSAM = Paper(
    "Asymptotic Unbiased Sample Sampling to Speed Up Sharpness-Aware Minimization",
    "Deng, Jiaxin and Pang, Junbiao and Zhang, Baochang and Guo, Guodong",
    "AAAI Conference on Artificial Intelligence",
    2025,
    "2406.08001",
    "deng2025asymptotic",
)
ADASAM = Paper(
    "AdaSAM: Boosting Sharpness-Aware Minimization with Adaptive Learning Rate and Momentum for Training Deep "
    "Neural Networks",
    "Sun, Hao and Shen, Li and Zhong, Qihuang and Ding, Liang and Chen, Shixiang and Sun, Jingwei and Li, "
    "Jing and Sun, Guangzhong and Tao, Dacheng",
    "Neural Networks, 169",
    2024,
    "2303.00565",
    "sun2024adasam",
)
GSAM = Paper(
    "Surrogate Gap Minimization Improves Sharpness-Aware Training",
    "Zhuang, Juntang and Gong, Boqing and Yuan, Liangzhe and Cui, Yin and Adam, Hartwig and Dvornek, Nicha "
    "and Tatikonda, Sekhar and Duncan, James and Liu, Ting",
    "International Conference on Learning Representations",
    2022,
    "2203.08065",
    "zhuang2022surrogate",
)
WSAM = Paper(
    "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term",
    "Yue, Yun and Jiang, Jiadi and Ye, Zhiling and Gao, Ning and Liu, Yongchao and Zhang, Ke",
    "ACM SIGKDD Conference on Knowledge Discovery and Data Mining",
    2023,
    "2305.15817",
    "yue2023sharpness",
)
VASSO = Paper(
    "Enhancing Sharpness-Aware Optimization Through Variance Suppression",
    "Li, Bingcong and Giannakis, Georgios B.",
    "Advances in Neural Information Processing Systems, 36",
    2023,
    "2309.15639",
    "li2023enhancing",
)
MOMENTUM_SAM = Paper(
    "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead",
    "Becker, Marlon and Altrock, Frederick and Risse, Benjamin",
    "arXiv preprint",
    2024,
    "2401.12033",
    "becker2024momentum",
)
