#!/bin/bash
# Runs a class of Kafka with the variables that the original script knows:
# KAFKA_HEAP_OPTS, KAFKA_JVM_PERFORMANCE_OPTS, KAFKA_JMX_OPTS, KAFKA_LOG4J_OPTS
# and KAFKA_OPTS. Each holds a list of options, so word splitting is wanted.
set -euo pipefail

logging="-Dlog4j2.configurationFile=/etc/kafka/docker/tools-log4j2.yaml"

# shellcheck disable=SC2086
exec "$JAVA_HOME/bin/java" \
  ${KAFKA_HEAP_OPTS:--Xmx256m} \
  ${KAFKA_JVM_PERFORMANCE_OPTS-} \
  ${KAFKA_JMX_OPTS-} \
  ${KAFKA_LOG4J_OPTS:-$logging} \
  ${KAFKA_OPTS-} \
  -cp "/opt/kafka/libs/*" "$@"
