"""Figures hold the numbers they are given, say what they are, and refuse a log that has none."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from hf_ssam.plots import (
    history,
    plot_edge,
    plot_loss_line,
    plot_loss_plane,
    plot_rho_sweep,
    plot_run,
    plot_runs,
    plot_spectrum,
    series,
)
from hf_ssam.sharpness import Line, Plane, Spectrum, edge_of_stability, spectrum

LOG = [
    *(
        {
            "step": s,
            "loss": 2.0 / s,
            "ssam/ascent_loss": 2.2 / s,
            "ssam/scale": 0.9,
            "ssam/rho": 0.05 / s,
            "ssam/grad_norm": 1.0,
            "ssam/ascent_grad_norm": 1.1,
            "ssam/perturbation_norm": 0.05,
        }
        for s in range(1, 21)
    ),
    *({"step": s, "eval_accuracy": s / 20, "eval_loss": 3.0 / s} for s in (10, 20)),
    *(
        {"step": s, "sharpness/top_eigenvalue": 1.0 + s, "sharpness/edge": 15.0, "sharpness/edge_gd": 20.0}
        for s in (0, 10, 20)
    ),
    {"step": 20, "train_runtime": 1.0},
]


def curves(ax) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()}


def is_png(path) -> bool:
    image = Image.open(path)
    return image.format == "PNG" and len(set(image.convert("L").resize((64, 64)).tobytes())) > 5


class TestHistory:
    def test_of_entries_of_a_file_and_of_folders(self, tmp_path):
        for name, steps in (("checkpoint-9", 1), ("checkpoint-10", 2)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": steps}]}))
        assert history(tmp_path) == [{"step": 2}]
        assert history(str(tmp_path / "checkpoint-9")) == [{"step": 1}]
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
        assert history(tmp_path) == history(tmp_path / "trainer_state.json") == history(LOG) == LOG

    def test_a_folder_without_a_state(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no trainer_state.json .* call trainer.save_state\(\)"):
            history(tmp_path)

    def test_series_leaves_out_what_is_not_a_number(self):
        log = [{"step": 1, "a": 1.0}, {"step": 2, "a": float("nan")}, {"step": 3, "a": "x"}, {"step": 3, "b": 1}]
        assert series(log, "a") == ([1], [1.0])


class TestRuns:
    def test_a_run(self, tmp_path):
        axes = plot_run(LOG, tmp_path / "run.png")
        assert [ax.get_title() for ax in axes] == [
            "Loss",
            "Evaluation accuracy",
            "Factor γ = ‖g‖/‖ĝ‖ of the step",
            "Norms of the gradients",
            "Perturbation",
            "Top Hessian eigenvalue",
        ]
        assert curves(axes[4])["radius ρ"] == (list(range(1, 21)), [0.05 / s for s in range(1, 21)])
        assert curves(axes[5])["λ₁"] == ([0, 10, 20], [1.0, 11.0, 21.0])
        assert curves(axes[0])["training, at w"] == (list(range(1, 21)), [2.0 / s for s in range(1, 21)])
        assert curves(axes[0])["evaluation"] == ([10, 20], [0.3, 0.15])
        assert curves(axes[1])["evaluation"] == ([10, 20], [0.5, 1.0])
        assert all(ax.get_xlabel() == "optimizer step" and ax.get_ylabel() for ax in axes)
        assert is_png(tmp_path / "run.png")

    def test_a_constant_perturbation_has_no_panel_and_two_evaluations_no_line(self):
        axes = plot_run([{**entry, "ssam/rho": 0.05} if "ssam/rho" in entry else entry for entry in LOG])
        assert "Perturbation" not in [ax.get_title() for ax in axes]
        lines = {line.get_label(): line.get_linestyle() for line in axes[0].get_lines()}
        assert lines == {"training, at w": "-", "training, at w + e": "-", "evaluation": "None"}

    def test_a_stock_run_has_fewer_panels(self):
        assert len(plot_run([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])) == 1
        with pytest.raises(ValueError, match="source: the log holds no loss, accuracy"):
            plot_run([{"step": 1, "train_runtime": 3.0}])

    def test_a_run_that_is_scored_otherwise(self):
        log = [{"step": s, "eval_loss": 1.0, "eval_runtime": 2.0, "eval_mean_f1": s / 4} for s in (1, 2)]
        axes = plot_run(log)
        assert [ax.get_title() for ax in axes] == ["Loss", "Evaluation mean f1"]
        assert curves(axes[1])["evaluation"] == ([1, 2], [0.25, 0.5])

    def test_two_runs(self, tmp_path):
        slower = [{**e, "loss": e["loss"] * 2} if "loss" in e else e for e in LOG]
        axes = plot_runs({"ssam": LOG, "adamw": slower}, tmp_path / "runs.png")
        assert [ax.get_title() for ax in axes] == [
            "Training loss",
            "Evaluation accuracy",
            "Loss at w + e",
            "Norm of the gradient",
            "Top Hessian eigenvalue",
        ]
        assert curves(axes[0])["adamw"][1] == [4.0 / s for s in range(1, 21)]
        assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["ssam", "adamw"]
        assert is_png(tmp_path / "runs.png")

    def test_a_sweep(self, tmp_path):
        ax = plot_rho_sweep({0.1: [0.8, 0.9], 0.05: [0.7, 0.8]}, [0.6, 0.7], path=tmp_path / "sweep.png")
        mean = curves(ax)["mean of 2 seeds"]
        assert mean[0] == [0.05, 0.1]
        assert mean[1] == pytest.approx([0.75, 0.85])
        assert curves(ax)["no perturbation: mean, range"][1] == pytest.approx([0.65, 0.65])
        assert [t.get_text() for t in ax.get_xticklabels()] == ["0.05", "0.1"]
        assert is_png(tmp_path / "sweep.png")


class TestCurvature:
    def test_eigenvalue_and_edge(self, tmp_path):
        ax = plot_edge(LOG, tmp_path / "edge.png")
        assert curves(ax)["measured λ₁"] == ([0, 10, 20], [1.0, 11.0, 21.0])
        assert curves(ax)["predicted edge of this method"][1] == [15.0] * 3
        assert is_png(tmp_path / "edge.png")
        with pytest.raises(ValueError, match="train with --sharpness_steps"):
            plot_edge([{"step": 1, "loss": 1.0}])

    def test_an_edge_at_infinity_does_not_hide_the_eigenvalue(self):
        lrs = (0.1, 1e-9)
        log = [
            {
                "step": i,
                "sharpness/top_eigenvalue": 5.0,
                "sharpness/edge": edge_of_stability(lr, 0.05, method="usam").edge,
            }
            for i, lr in enumerate(lrs)
        ]
        assert plot_edge(log).get_ylim()[1] < 50
        assert "predicted edge of this method (above the figure)" in curves(plot_edge(log[1:]))

    def test_a_spectrum(self, tmp_path):
        class Quadratic(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(50, dtype=torch.float64))

            def forward(self, h):
                return SimpleNamespace(loss=0.5 * (h * self.w**2).sum(1).mean())

        found = spectrum(Quadratic(), {"h": torch.linspace(-1, 9, 50, dtype=torch.float64)[None]}, 20, 2)
        ax = plot_spectrum(found, tmp_path / "spectrum.png")
        x, y = ax.get_lines()[0].get_data()
        np.testing.assert_allclose(y, found.density(x, 0.01 * (found.nodes[-1] - found.nodes[0])), rtol=1e-6)
        assert list(curves(ax))[0] == "λ₁ ≈ 9 (▼)"
        assert "standard deviation 0.1" in ax.get_xlabel()
        assert is_png(tmp_path / "spectrum.png")

    def test_two_spectra_have_a_legend(self):
        one = Spectrum(np.array([0.0, 1.0]), np.array([0.5, 0.5]), 1, 0.0, 10, "float32")
        ax = plot_spectrum({"ssam": one, "sgd": one})
        assert [t.get_text() for t in ax.get_legend().get_texts()] == ["ssam: λ₁ ≈ 1 (▼)", "sgd: λ₁ ≈ 1 (▼)"]

    def test_marker_of_the_largest_eigenvalue_stands_on_a_bump_of_its_curve(self):
        """A start vector that is nearly orthogonal to the top eigenvector gives it next to no mass."""
        missed = Spectrum(np.array([0.0, 10.0]), np.array([1 - 1e-12, 1e-12]), 1, 0.0, 1000, "float32")
        ax = plot_spectrum({"ssam": missed, "sgd": missed})
        x, y = ax.get_lines()[0].get_data()
        near, between = y[np.abs(x - 10.0).argmin()], y[np.abs(x - 9.0).argmin()]
        assert near == pytest.approx(1 / 1000 / (0.1 * np.sqrt(2 * np.pi)), rel=1e-2)
        assert near > ax.get_ylim()[0] > between
        marker = ax.get_lines()[1]
        assert marker.get_xdata()[0] == 10.0 and near < marker.get_ydata()[0] < 2 * near

    def test_lines_of_two_models_begin_at_one_point(self):
        t = np.linspace(-1, 1, 5)
        ax = plot_loss_line({"a": Line(t, 3 + t**2), "b": Line(t, 1 + 2 * t**2)}, rise=True, title="along v", x="t")
        assert curves(ax)["a (loss 3)"][1] == (t**2).tolist() and curves(ax)["b (loss 1)"][1] == (2 * t**2).tolist()
        assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("along v", "t", "loss above that at w")

    def test_lines_and_a_plane(self, tmp_path):
        t = np.linspace(-1, 1, 5)
        ax = plot_loss_line({"top eigenvector": Line(t, t**2), "random": Line(t, 0 * t)}, tmp_path / "line.png")
        assert curves(ax)["top eigenvector"][1] == (t**2).tolist()
        losses = t[:, None] ** 2 + 3 * t**2
        losses[0, 0] = np.nan
        ax = plot_loss_plane(Plane(t, losses), tmp_path / "plane.png", names=("a", "b"))
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "b")
        assert is_png(tmp_path / "line.png")
        assert is_png(tmp_path / "plane.png")

    def test_planes_side_by_side_share_their_levels(self, tmp_path):
        t = np.linspace(-1, 1, 5)
        bowl = t[:, None] ** 2 + t**2
        first = plot_loss_plane({"ssam": Plane(t, bowl), "sgd": Plane(t, 10 * bowl)}, tmp_path / "plane.png")
        ssam, sgd, bar = first.figure.axes
        assert first is ssam
        assert (ssam.get_title(), sgd.get_title(), bar.get_ylabel()) == ("ssam", "sgd", "loss")
        left, right = (ax.collections[0].levels for ax in (ssam, sgd))
        np.testing.assert_array_equal(left, right)
        assert right.max() >= 20

    def test_draws_where_it_is_told_to(self):
        figure = Figure()
        ax = figure.subplots()
        assert plot_edge(LOG, ax=ax) is ax
        assert figure.axes == [ax]
