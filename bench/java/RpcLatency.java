import com.rabbitmq.client.AMQP;
import com.rabbitmq.client.Channel;
import com.rabbitmq.client.Connection;
import com.rabbitmq.client.ConnectionFactory;
import com.rabbitmq.client.RpcClient;
import com.rabbitmq.client.RpcClientParams;
import java.util.Arrays;
import java.util.Locale;
import java.util.Map;
import java.util.concurrent.locks.LockSupport;

/**
 * What rabbitmq_rpc_latency does, with the Java client: its own RpcClient asks by
 * direct reply-to, and a consumer without acknowledgements answers.
 *
 * <p>Words: {@code responder}, or {@code direct COUNT [RATE]}. Prints the line of the
 * example, in microseconds, so that both are read alike.
 */
public final class RpcLatency {
    private static final String QUESTIONS = "latency.quotes";
    private static final int SIZE = 100;
    private static final String EXPIRATION = "8000";

    /** Asked before it is measured, until the virtual machine has compiled the way. */
    private static final int WARM_UP = 5000;

    private static final int PATIENCE = 8000;

    public static void main(String[] words) throws Exception {
        ConnectionFactory factory = new ConnectionFactory();
        factory.setUri(System.getenv("AMQP_URL"));
        Connection connection = factory.newConnection();
        Channel channel = connection.createChannel();
        if (words[0].equals("responder")) {
            answerAll(channel);
            // Until it is asked to stop.
            Thread.currentThread().join();
        }
        int count = Integer.parseInt(words[1]);
        int rate = words.length > 2 ? Integer.parseInt(words[2]) : 0;
        askAll(channel, count, rate);
        connection.close();
    }

    private static void answerAll(Channel channel) throws Exception {
        Map<String, Object> classic = Map.of("x-queue-type", "classic");
        channel.queueDeclare(QUESTIONS, true, false, false, classic);
        channel.queuePurge(QUESTIONS);
        channel.basicConsume(
                QUESTIONS,
                true,
                (tag, question) -> {
                    AMQP.BasicProperties asked = question.getProperties();
                    AMQP.BasicProperties properties =
                            new AMQP.BasicProperties.Builder()
                                    .correlationId(asked.getCorrelationId())
                                    .build();
                    channel.basicPublish(
                            "", asked.getReplyTo(), properties, question.getBody());
                },
                tag -> {});
        System.out.println("ready:    answers " + QUESTIONS);
    }

    private static void askAll(Channel channel, int count, int rate) throws Exception {
        RpcClient client =
                new RpcClient(
                        new RpcClientParams()
                                .channel(channel)
                                .exchange("")
                                .routingKey(QUESTIONS)
                                .timeout(PATIENCE));
        AMQP.BasicProperties properties =
                new AMQP.BasicProperties.Builder().expiration(EXPIRATION).build();
        byte[] payload = new byte[SIZE];
        Arrays.fill(payload, (byte) 'q');
        ask(client, properties, payload, WARM_UP, rate);
        long started = System.nanoTime();
        long[] latencies = ask(client, properties, payload, count, rate);
        double seconds = (System.nanoTime() - started) / 1e9;
        Arrays.sort(latencies);
        System.out.printf(
                Locale.ROOT,
                "answered: %d requests of %d B in %.3f s (p50 %d us, p99 %d us), direct%n",
                count,
                SIZE,
                seconds,
                latencies[count / 2],
                latencies[(int) (count * 0.99)]);
        client.close();
    }

    /** In microseconds; each from the moment at which the question was due. */
    private static long[] ask(
            RpcClient client, AMQP.BasicProperties properties, byte[] payload, int count, int rate)
            throws Exception {
        long[] latencies = new long[count];
        long started = System.nanoTime();
        for (int number = 0; number < count; number++) {
            long due = rate > 0 ? started + number * 1_000_000_000L / rate : System.nanoTime();
            for (long left; (left = due - System.nanoTime()) > 0; ) {
                LockSupport.parkNanos(left);
            }
            client.primitiveCall(properties, payload);
            latencies[number] = (System.nanoTime() - due) / 1000;
        }
        return latencies;
    }

    private RpcLatency() {}
}
