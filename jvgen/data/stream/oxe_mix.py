"""The mix of Open X-Embodiment data sets that iVideoGPT is pretrained on (arXiv 2405.15223, table 4)."""

from typing import NamedTuple

from jvgen.data.stream.config import SourceConfig


class Entry(NamedTuple):
    """One data set.

    Attributes:
      name: its TFDS name in Open X-Embodiment; each view of a data set with several is a separate entry.
      trajectories: number of episodes used.
      frame_stride: see `SourceConfig`; it evens out frame rates.
      camera: key of the frames.
    """

    name: str
    trajectories: int
    frame_stride: int
    camera: str = "image"


# Shares without Something-Something v2; the other data sets share the rest equally.
WEIGHTS = {
    "fractal20220817_data": 0.15,
    "bridge": 0.15,
    "bc_z": 0.15,
    "robo_net": 0.15,
    "kuka": 0.10,
    "language_table": 0.05,
    "stanford_mask_vit_converted_externally_to_rlds": 0.05,
}
# Episodes that other data sets test on; see `SourceConfig.exclude`.
EXCLUDED = {"robo_net": "robonet_test"}
SMALL_SHARE = 0.20
SOMETHING_SHARE = 0.15

MIX = (
    Entry("fractal20220817_data", 87_212, 1),
    Entry("bridge", 28_935, 2),
    Entry("bc_z", 43_264, 3),
    Entry("robo_net", 82_649, 1),
    Entry("kuka", 580_392, 3),
    Entry("language_table", 442_226, 3, "rgb"),
    Entry("stanford_mask_vit_converted_externally_to_rlds", 9_200, 1),
    *(Entry(f"uiuc_d3field_{view}", 192, 1, f"image_{view}") for view in range(1, 5)),
    Entry("taco_play", 3_603, 5, "rgb_static"),
    Entry("jaco_play", 1_085, 3),
    Entry("roboturk", 1_995, 3, "front_rgb"),
    Entry("viola", 150, 7, "agentview_rgb"),
    Entry("toto", 1_003, 10),
    Entry("columbia_cairlab_pusht_real", 136, 3),
    Entry("stanford_kuka_multimodal_dataset_converted_externally_to_rlds", 3_000, 7),
    Entry("stanford_hydra_dataset_converted_externally_to_rlds", 570, 3),
    Entry("austin_buds_dataset_converted_externally_to_rlds", 50, 7),
    Entry("nyu_franka_play_dataset_converted_externally_to_rlds", 456, 1),
    Entry("furniture_bench_dataset_converted_externally_to_rlds", 5_100, 3),
    Entry("ucsd_kitchen_dataset_converted_externally_to_rlds", 150, 1),
    Entry("ucsd_pick_and_place_dataset_converted_externally_to_rlds", 1_355, 1),
    Entry("austin_sailor_dataset_converted_externally_to_rlds", 240, 7),
    Entry("utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds", 240, 3),
    Entry("utokyo_xarm_pick_and_place_converted_externally_to_rlds", 102, 3),
    Entry("utokyo_xarm_bimanual_converted_externally_to_rlds", 70, 3),
    Entry("kaist_nonprehensile_converted_externally_to_rlds", 201, 3),
    Entry("dlr_sara_pour_converted_externally_to_rlds", 100, 3),
    Entry("dlr_sara_grid_clamp_converted_externally_to_rlds", 107, 3),
    Entry("dlr_edan_shared_control_converted_externally_to_rlds", 104, 3),
    Entry("asu_table_top_converted_externally_to_rlds", 110, 4),
    Entry("utaustin_mutex", 1_500, 7),
    Entry("berkeley_fanuc_manipulation", 415, 3),
    Entry("cmu_playing_with_food", 174, 3),
    Entry("cmu_play_fusion", 576, 2),
    Entry("cmu_stretch", 135, 3),
)


def weights(*, something: bool) -> dict[str, float]:
    """Weight of every entry of the mix; with `something`, scaled down by the share of Something-Something v2."""
    small = [entry.name for entry in MIX if entry.name not in WEIGHTS]
    shares = WEIGHTS | {name: SMALL_SHARE / len(small) for name in small}
    left = 1 - SOMETHING_SHARE if something else 1.0
    return {entry.name: left * shares[entry.name] for entry in MIX}


def sources(folder: str, *, something: str | None = None, split: str = "train") -> tuple[SourceConfig, ...]:
    """The mix as sources of a run. The 126 episodes of RoboNet's test set are left out of `robo_net`, as published.

    Args:
      folder: folder with one data set per entry, under its name (see `jvgen data build robot-episodes`).
      something: path of a data set of Something-Something v2 clips (tokenizer of 64x64 frames); None to leave it out.
      split: split of every data set.
    """
    shares = weights(something=something is not None)
    chosen = [
        SourceConfig(
            path=f"{folder}/{entry.name}",
            split=split,
            weight=shares[entry.name],
            frame_stride=entry.frame_stride,
            exclude=EXCLUDED.get(entry.name),
        )
        for entry in MIX
    ]
    if something is not None:
        chosen.append(SourceConfig(path=something, split=split, weight=SOMETHING_SHARE))
    return tuple(chosen)
