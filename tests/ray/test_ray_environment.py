"""Which variables travel, and whose value wins."""

from __future__ import annotations

from engine.executor.ray_environment import PER_NODE, carried_environment, node_host_environment


def test_what_ranks_read_travels_and_nothing_else() -> None:
    driver = {
        "NCCL_IB_TC": "106", "TORCH_NCCL_BLOCKING_WAIT": "1", "HF_HUB_OFFLINE": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "NCCL_DEBUG": "WARN",
        "PATH": "/bin", "HOME": "/root", "PYTHONPATH": "/x", "AWS_ACCESS_KEY_ID": "a", "LD_PRELOAD": "evil.so",
    }  # fmt: skip
    assert carried_environment(driver) == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HF_HUB_OFFLINE": "1",
        "NCCL_DEBUG": "WARN",
        "NCCL_IB_TC": "106",
        "TORCH_NCCL_BLOCKING_WAIT": "1",
    }


def test_names_of_one_node_of_one_rank_and_secrets_stay() -> None:
    stays = {
        *PER_NODE, "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
        "HF_TOKEN", "HF_TOKEN_PATH", "HLAUNCH_API_KEY", "HLAUNCH_SECRET", "HF_HUB_CACHE", "HLAUNCH_MODEL_DIR",
        "NCCL_LIBRARY_PATH", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "HLAUNCH_NODE_SECRET_FILE",
        "NCCL_DEBUG_FILE",
    }  # fmt: skip
    assert carried_environment(dict.fromkeys(stays, "x")) == {}


def test_the_word_of_the_node_wins_over_what_was_carried() -> None:
    carried = carried_environment({"NCCL_IB_TC": "106", "NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "=mlx5_0"})
    node = {"NCCL_DEBUG": "WARN", "NCCL_IB_HCA": "=rocep1s0f0", "PATH": "/usr/bin", "RANK": "1", "MASTER_PORT": "8000"}
    assert node_host_environment(node, carried) == {
        "NCCL_DEBUG": "WARN",
        "NCCL_IB_HCA": "=rocep1s0f0",
        "NCCL_IB_TC": "106",
        "PATH": "/usr/bin",
    }


def test_what_ray_gave_its_worker_does_not_reach_ranks() -> None:
    node = {
        "RAY_AUTH_TOKEN_PATH": "/run/secrets/ray_token", "RAY_JOB_ID": "1", "RAY_RAYLET_PID": "7",
        "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "eth0",
    }  # fmt: skip
    assert node_host_environment(node, {}) == {"GLOO_SOCKET_IFNAME": "eth0"}
    # Somebody who hides GPUs on purpose is heard.
    assert node_host_environment({"CUDA_VISIBLE_DEVICES": "2,3"}, {})["CUDA_VISIBLE_DEVICES"] == "2,3"
