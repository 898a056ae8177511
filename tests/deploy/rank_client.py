"""A client for tests of ranks on several nodes: `rank_client.py HOST one|many`, the API key in the variable KEY.

`one` prints status and text of a greedy completion. `many` prints `streaming` once tokens come, and in the end a JSON
list with, for each long stream, when it ended (wall clock) and the last line that it got.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time

PROMPT, NUM_TOKENS, NUM_STREAMS = "ROMEO: What say", 12, 4


def ask(host: str, **options: object) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(host, 8000, timeout=60)
    body = {"model": "tiny-oss", "prompt": PROMPT, "temperature": 0, **options}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['KEY']}"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection.getresponse()


def one(host: str) -> str:
    response = ask(host, max_tokens=NUM_TOKENS)
    answer = json.loads(response.read())
    return f"{response.status} {json.dumps(answer['choices'][0]['text'] if response.status == 200 else answer)}"


def many(host: str) -> str:
    first, ends = threading.Event(), []

    def stream(seed: int) -> None:
        said = ""
        try:
            for line in ask(host, max_tokens=1500, stream=True, ignore_eos=True, seed=seed):
                said = line.decode().strip() or said
                first.set()
        except (OSError, http.client.HTTPException) as error:
            said = f"error: {error!r}"
        ends.append((round(time.time(), 2), said))

    threads = [threading.Thread(target=stream, args=(seed,)) for seed in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    first.wait(60)
    print("streaming", flush=True)
    for thread in threads:
        thread.join()
    return json.dumps(ends)


if __name__ == "__main__":
    try:
        print((one if sys.argv[2] == "one" else many)(sys.argv[1]))
    except OSError as error:
        print(f"no answer: {error}")
