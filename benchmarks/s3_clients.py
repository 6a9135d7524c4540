"""Which client gets objects of a bucket into files fastest, and for how much CPU time.

Run by a Python that has all of them (`pip install nanio obstore s3fs s3torchconnector boto3`), as
they want other versions of this repository's packages:

    DIR/bin/python benchmarks/s3_clients.py
"""

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OBJECTS, SIZE, STREAMS, ROUNDS, CHUNK = 6, 96 << 20, 4, 3, 4 << 20
NAMES = [f"store/{number}" for number in range(OBJECTS)]


def by_obstore(out: Path) -> None:
    import obstore
    from obstore.store import from_url

    store = from_url("s3://bench", client_options={"allow_http": True})

    def get(name: str) -> None:
        with (out / Path(name).name).open("wb", buffering=0) as file:
            for chunk in obstore.get(store, name).stream(CHUNK):
                file.write(chunk)

    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(get, NAMES))


def by_s3fs(out: Path) -> None:
    import s3fs

    system = s3fs.S3FileSystem(skip_instance_cache=True)
    files = [str(out / Path(name).name) for name in NAMES]
    system.get([f"bench/{name}" for name in NAMES], files, batch_size=STREAMS)


def by_s3torchconnector(out: Path) -> None:
    from s3torchconnector import S3ClientConfig
    from s3torchconnector._s3client import S3Client

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    settings = S3ClientConfig(force_path_style=True)
    client = S3Client("us-east-1", endpoint=endpoint, s3client_config=settings)

    def get(name: str) -> None:
        with (out / Path(name).name).open("wb", buffering=0) as file:
            shutil.copyfileobj(client.get_object("bench", name), file, CHUNK)

    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(get, NAMES))


def by_boto3(out: Path) -> None:
    import boto3
    from boto3.s3.transfer import TransferConfig

    client, settings = boto3.client("s3"), TransferConfig(max_concurrency=STREAMS)
    for name in NAMES:
        client.download_file("bench", name, str(out / Path(name).name), Config=settings)


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = {"AWS_ACCESS_KEY_ID": "bench-key", "AWS_SECRET_ACCESS_KEY": "bench-secret"}
    os.environ.update(keys, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    os.environ.update(AWS_REGION="us-east-1", AWS_DEFAULT_REGION="us-east-1")
    own = {"NANIO_ACCESS_KEY": "bench-key", "NANIO_SECRET_KEY": "bench-secret"}
    with tempfile.TemporaryDirectory() as folder:
        content = os.urandom(SIZE)
        (Path(folder) / "data" / "bench" / "store").mkdir(parents=True)
        for name in NAMES:
            (Path(folder) / "data" / "bench" / name).write_bytes(content)
        words = ["--data-dir", f"{folder}/data", "--port", str(port), "--no-access-log"]
        program = Path(sys.executable).with_name("nanio")
        server = subprocess.Popen([program, "serve", *words], env={**os.environ, **own})
        try:
            time.sleep(3)
            for number in range(ROUNDS):
                for get in (by_obstore, by_s3fs, by_s3torchconnector, by_boto3):
                    out = Path(tempfile.mkdtemp(dir=folder))
                    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
                    get(out)
                    seconds = time.perf_counter() - started
                    after = resource.getrusage(resource.RUSAGE_SELF)
                    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                    assert all(path.stat().st_size == SIZE for path in out.iterdir())
                    shutil.rmtree(out)
                    size = OBJECTS * SIZE / 1e6
                    if number:
                        print(
                            f"{get.__name__:<20} {size / seconds:6.0f} MB/s "
                            f"{1e3 * cpu / size:5.2f} s of CPU a GB",
                            flush=True,
                        )
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
