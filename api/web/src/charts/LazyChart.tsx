// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The chart, fetched when the first one is shown.
import { Skeleton } from '@mantine/core';
import { lazy, Suspense } from 'react';

import type { ChartProps } from './Chart';
import { Panel } from '../ui/Panel';

const Chart = lazy(() => import('./Chart'));

export function ChartPanel(props: ChartProps) {
  return (
    <Panel title={props.title}>
      <Suspense fallback={<Skeleton h={198} />}>
        <Chart {...props} />
      </Suspense>
    </Panel>
  );
}
