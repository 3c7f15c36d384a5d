"""What a JobSet of ours may contain: a strict part of the schema of jobset.x-k8s.io/v1alpha2, for `jsonschema`."""


def strict(required: dict, **optional: dict) -> dict:
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
ACTIONS = [
    "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"
]  # fmt: skip
RULE = strict(
    # A webhook fills in a missing name; the schema requires it.
    {"name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"}, "action": {"enum": ACTIONS}},
    onJobFailureReasons={
        "type": "array",
        "uniqueItems": True,
        "items": {
            "enum": [
                "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
                "PodFailurePolicy",
            ]
        },
    },
    onJobFailureMessagePatterns={"type": "array", "uniqueItems": True, "items": TEXT},
    targetReplicatedJobs={"type": "array", "items": TEXT},
)  # fmt: skip
JOBSET = strict(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": strict({"name": TEXT}, namespace=TEXT, labels=TEXTS, annotations=TEXTS),
        "spec": strict(
            {
                "failurePolicy": strict(
                    {"maxRestarts": COUNT, "rules": {"type": "array", "minItems": 1, "items": RULE}},
                    restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
                ),
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    # The Job itself is checked by the schemas of Kubernetes.
                    "items": strict({"name": TEXT, "replicas": COUNT, "template": {"type": "object"}}),
                },
            },
            ttlSecondsAfterFinished=COUNT,
        ),
    }
)
