# One image for all nodes of a cluster (head, data, training) and the place where the packages are: code comes with each
# job (`ray job submit --working-dir .`), because torch in a job's own environment would be gigabytes per node.
#
# Ray and the Python minor version must be those of the machine that submits, so both are in the tag and
# tests/integration/test_cluster_yaml.py compares them with requirements.txt. The -gpu image runs on CPU nodes too.
FROM rayproject/ray:2.60.0-py311-gpu

# boto3: the autoscaler on the head launches EC2 nodes with it, and MLflow stores artifacts in S3 with it. Its pins are
# in the test requirements, since nothing on a laptop needs it.
COPY --chown=ray requirements.txt requirements-test.txt /home/ray/
RUN grep -E '^(boto3|botocore|jmespath|s3transfer)==' /home/ray/requirements-test.txt > /home/ray/requirements-aws.txt \
    && pip install --no-cache-dir -r /home/ray/requirements.txt -r /home/ray/requirements-aws.txt

COPY --chown=ray rayjobs/spot_notice.py /home/ray/spot_notice.py
