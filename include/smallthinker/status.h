/* What a read of the C core returns: 0 or a negative value. A failed one becomes an ExpertReadError of errors.py. */
#ifndef SMALLTHINKER_STATUS_H
#define SMALLTHINKER_STATUS_H

typedef enum st_status {
    ST_OK = 0,
    ST_ERR_IO = -1 /* a read failed or came back short */
} st_status;

#endif
