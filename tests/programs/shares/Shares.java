// Spends CPU time in named methods, as `profiled shares` does: `Shares MILLISECONDS`. Methods are
// compiled while it warms up, for `jcmd PID Compiler.perfmap`; then it says that it is ready, reads
// a byte, and prints the truth.
import java.lang.management.ManagementFactory;
import java.lang.management.ThreadMXBean;

public final class Shares {
    private static final ThreadMXBean THREADS = ManagementFactory.getThreadMXBean();
    private static int sink;

    private static long cpuNs() {
        return THREADS.getCurrentThreadCpuTime();
    }

    // Each is a method of its own for the compiler.
    static long spendMost(long ns) {
        long began = cpuNs();
        int x = 1;
        while (cpuNs() < began + ns) for (int i = 0; i < 100_000; i++) x = x * 31 + i;
        sink += x;
        return cpuNs() - began;
    }

    static long spendSome(long ns) {
        long began = cpuNs();
        int x = 2;
        while (cpuNs() < began + ns) for (int i = 0; i < 100_000; i++) x = x * 33 + i;
        sink += x;
        return cpuNs() - began;
    }

    static long spendLittle(long ns) {
        long began = cpuNs();
        int x = 3;
        while (cpuNs() < began + ns) for (int i = 0; i < 100_000; i++) x = x * 35 + i;
        sink += x;
        return cpuNs() - began;
    }

    static void descend(int depth, long unitNs, long[] spent) {
        if (depth > 0) {
            descend(depth - 1, unitNs, spent);
            return;
        }
        spent[0] += spendMost(7 * unitNs);
        spent[1] += spendSome(2 * unitNs);
        spent[2] += spendLittle(unitNs);
    }

    public static void main(String[] arguments) throws Exception {
        long[] spent = new long[3];
        long until = cpuNs() + 2_000_000_000L;
        while (cpuNs() < until) descend(8, 10_000, spent);
        System.out.println("ready");
        System.in.read();
        spent = new long[3];
        long turns = Long.parseLong(arguments[0]) / 10;
        for (long turn = 0; turn < turns; turn++) descend(8, 1_000_000, spent);
        System.out.println("spendMost " + spent[0] + "\nspendSome " + spent[1]);
        System.out.println("spendLittle " + spent[2]);
    }
}
