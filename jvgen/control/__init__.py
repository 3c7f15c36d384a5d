"""World models to act in: reset, step and rollout with checked input, a gymnasium environment, interactive episodes.
Agents, replays and imagined experience too; runs that put them together are in `jvgen.reinforcement`. The networks are
in `jvgen.models.ivideogpt`, their training in `jvgen.tasks`.

The names below are usable as `jvgen.control.NAME`; each is imported when it is first used. The environments need
`jvgen[control]`, Meta-World's `jvgen[metaworld]`.
"""

from jvgen.lazy_names import lazy_names

_MODULES = {
    "Cost": "control.costs",
    "Imagination": "control.imagination",
    "Imagined": "control.imagination",
    "ImaginedWorld": "control.worlds",
    "MetaWorldEnvironment": "control.metaworld",
    "open_environment": "control.environments",
    "perceptual_goal": "control.costs",
    "pixel_goal": "control.costs",
    "Plan": "control.planning",
    "PlannedPolicy": "control.receding_horizon",
    "Planner": "control.planning",
    "PlannerConfig": "control.planning",
    "predicted_reward": "control.costs",
    "RandomPolicy": "control.receding_horizon",
    "run_episode": "control.receding_horizon",
    "SceneEnvironment": "control.scene_environment",
    "SimulatedWorld": "control.worlds",
    "vp2_cem": "control.planning",
    "vp2_mppi": "control.planning",
    "weighted": "control.costs",
    "WorldModel": "control.world_model",
    "WorldModelEnvironment": "control.environment",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
