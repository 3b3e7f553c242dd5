# One image for every process of a cluster: docker run … serve controller|group …, and all other commands.
ARG PYTHON=docker.io/library/python:3.12-slim
FROM ${PYTHON} AS build
WORKDIR /src
COPY pyproject.toml README.md ./
COPY wire wire
COPY raft raft
COPY shardctrler shardctrler
COPY shardkv shardkv
COPY client client
RUN python3 -m venv /opt/shardkv \
 && /opt/shardkv/bin/pip install --no-cache-dir --quiet --disable-pip-version-check '.[server,web,backup]'

FROM ${PYTHON}
COPY --from=build /opt/shardkv /opt/shardkv
ENV PATH=/opt/shardkv/bin:$PATH PYTHONUNBUFFERED=1
# Not root; a volume that is mounted here must belong to it.
RUN useradd --system --uid 10001 --no-create-home shardkv && install -d -m 0700 -o shardkv /var/lib/shardkv
USER shardkv
VOLUME /var/lib/shardkv
# SIGTERM, which a runtime sends by default, hands leadership over and ends in order.
STOPSIGNAL SIGTERM
ENTRYPOINT ["shardkv"]
CMD ["--help"]
