// Products of small matrices that stay in cache.

// A strided matrix: element (i, j) at data[i row + j column].
template <class T>
struct View {
    T* data;
    int64_t row, column;

    T& operator()(int64_t i, int64_t j) const { return data[i * row + j * column]; }
    View transposed() const { return {data, column, row}; }
    View from(int64_t i, int64_t j) const { return {&(*this)(i, j), row, column}; }
};

template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;     // columns of a panel: two vectors side by side, row by row
constexpr int kTile = S4_BYTES == 64 ? 8 : 4;  // rows at a time: as many as the registers hold

// M rows of a product against one panel, over its rows [from, to); c is row by row, added to or written.
template <class T, int M, class C>
void tile(View<const T> a, int64_t i, int64_t from, int64_t to, const T* panel, View<C> c, int64_t j,
                 int64_t columns, bool add) {
    constexpr int64_t lanes = kLanes<T>;
    constexpr int kChains = M == 1 ? 4 : 1;  // a single row would wait for each of its sums
    Vec<T> sums[kChains * M][2];
    for (auto& s : sums) s[0] = s[1] = Vec<T>{};
    int64_t k = from;
    for (; k + kChains <= to; k += kChains)
        for (int chain = 0; chain < kChains; ++chain) {
            const T* row = panel + 2 * lanes * (k + chain);
            const Vec<T> left = load(row), right = load(row + lanes);
            for (int m = 0; m < M; ++m) {
                const T s = a(i + m, k + chain);
                sums[chain * M + m][0] += s * left, sums[chain * M + m][1] += s * right;
            }
        }
    for (; k < to; ++k) {
        const Vec<T> left = load(panel + 2 * lanes * k), right = load(panel + 2 * lanes * k + lanes);
        for (int m = 0; m < M; ++m) sums[m][0] += a(i + m, k) * left, sums[m][1] += a(i + m, k) * right;
    }
    for (int chain = 1; chain < kChains; ++chain)
        for (int m = 0; m < M; ++m) sums[m][0] += sums[chain * M + m][0], sums[m][1] += sums[chain * M + m][1];
    for (int m = 0; m < M; ++m) {
        if constexpr (sizeof(C) == sizeof(T)) {
            if (columns == 2 * lanes && c.column == 1) {
                Vec<T> before[2]{};
                if (add) std::memcpy(before, &c(i + m, j), sizeof before);
                before[0] += sums[m][0], before[1] += sums[m][1];
                std::memcpy(&c(i + m, j), before, sizeof before);
                continue;
            }
        }
        T out[2 * lanes];
        std::memcpy(out, sums[m], sizeof out);
        for (int64_t l = 0; l < columns; ++l) c(i + m, j + l) = (add ? c(i + m, j + l) : C(0)) + C(out[l]);
    }
}

// Rows [begin, end) of c = a b, or c += a b, at one panel of b.
template <class T, class C>
void tiles(int64_t begin, int64_t end, View<const T> a, int64_t from, int64_t to, const T* panel, View<C> c,
                  int64_t j, int64_t columns, bool add) {
    int64_t i = begin;
    for (; i + kTile <= end; i += kTile) tile<T, kTile>(a, i, from, to, panel, c, j, columns, add);
    for (; i + 2 <= end; i += 2) tile<T, 2>(a, i, from, to, panel, c, j, columns, add);
    for (; i < end; ++i) tile<T, 1>(a, i, from, to, panel, c, j, columns, add);
}

// One panel of b, from column j on, converted to T and filled up with zeros.
template <class T, class B>
void pack_panel(int64_t depth, int64_t j, int64_t columns, View<const B> b, T* panel) {
    const int64_t taken = std::min(kPanel<T>, columns - j);
    if (b.column == 1 && taken == kPanel<T>) {
        for (int64_t k = 0; k < depth; ++k)
            for (int64_t l = 0; l < kPanel<T>; ++l) panel[k * kPanel<T> + l] = T((&b(k, j))[l]);
        return;
    }
    for (int64_t k = 0; k < depth; ++k)
        for (int64_t l = 0; l < kPanel<T>; ++l) panel[k * kPanel<T> + l] = l < taken ? T(b(k, j + l)) : T(0);
}

// c = a b, (rows, depth) by (depth, columns), computed in T.
template <class T, class B, class C>
void product(int64_t rows, int64_t columns, int64_t depth, View<const T> a, View<const B> b, View<C> c) {
    std::vector<T> panel(depth * kPanel<T>);
    for (int64_t j = 0; j < columns; j += kPanel<T>) {
        pack_panel<T>(depth, j, columns, b, panel.data());
        tiles<T>(0, rows, a, 0, depth, panel.data(), c, j, std::min(kPanel<T>, columns - j), false);
    }
}
